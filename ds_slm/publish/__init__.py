"""What others can use: generated text and Hugging Face folders."""
