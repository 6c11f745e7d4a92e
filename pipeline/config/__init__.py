"""What an experiment can say, how it is read and checked, and where its files are."""
