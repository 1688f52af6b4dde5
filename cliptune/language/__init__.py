"""What is shown to a person, in the language asked for. The English text is the key; it knows no other room, and is a
leaf that all may use where a line is printed, drawn or laid out: what is recorded stays English."""
