"""The backends' side: HTTP/1.1 connections to their servers, pooled; the hot path."""
