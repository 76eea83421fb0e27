"""Files of prompts: read them line by line, submit them, and write what came back."""
