"""What every party must agree on to the byte. Imports nothing of client, server or deploy."""
