"""What several rooms need and none owns: files written whole, eval mode, tables, timing in turns, memory."""
