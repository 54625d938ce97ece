"""The Milvus backend: client, collection, filters, search and ``MilvusStore``."""
