"""What FastStream makes of the topics: processors of users, and a description."""
