"""FlagEmbedding: BGEM3FlagModel, FlagLLMModel, FlagReranker, and its losses."""
