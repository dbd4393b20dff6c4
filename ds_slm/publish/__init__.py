"""Results that others can use: generated text and Hugging Face folders."""
