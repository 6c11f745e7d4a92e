"""What people look at: figures, the self-contained HTML pages, the tables in the terminal, coloured tokens."""
