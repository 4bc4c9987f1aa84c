"""One model, several backends and Hugging Face: where do they first differ, and by how much?"""
