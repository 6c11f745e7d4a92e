"""Files and preference rows: reading, checking, labelling, splitting, and the store of finished rows."""
