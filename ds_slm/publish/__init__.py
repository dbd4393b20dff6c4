"""What leaves the house: generated text and Hugging Face folders."""
