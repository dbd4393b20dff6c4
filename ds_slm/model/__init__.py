"""The decoder, its loss, and its names in the Hugging Face format."""
