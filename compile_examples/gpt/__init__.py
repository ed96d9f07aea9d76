"""The parts of train_gpt.py: what is read, what is trained, how it leaves for a file."""
