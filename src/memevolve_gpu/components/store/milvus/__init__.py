"""What ``MilvusStore`` is made of: the door to the server, the rows, the expressions and the search."""
