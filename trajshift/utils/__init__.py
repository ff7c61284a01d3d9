"""What any program needs: files, processes, the terminal, the machine. Nothing here knows about learning."""
