"""The parts of a memory: stores, retrieval strategies and management strategies."""
