"""OpenAI's endpoints: its official clients work unchanged, and every request is a job."""
