"""Local learning in the trainers of others; each module imports the library it is named after."""
