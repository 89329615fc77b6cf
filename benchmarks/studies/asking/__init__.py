"""What the studies that train nothing share: questions, ways to ask them, tables and figures."""
