"""What the chapters lean on. Skip it on a first reading; each room has one purpose and one page."""
