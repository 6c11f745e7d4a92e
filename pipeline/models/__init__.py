"""Language models on disk: fetching, loading, prompting, identity and memory."""
