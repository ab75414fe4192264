"""Structured answers: what a person gives as `schema` as a JSON schema, and an answer as values. Pure.

- `schema.py`: from a type, a dict or a DataFrame to its JSON schema, and from an answer's text to values.
- `types.py`: Python types as JSON schemas, and values of these types.
- `frames.py`: DataFrames as JSON schemas, and answers as DataFrames.
- `checks.py`: JSON read from a text, and checked against its schema.
"""
