"""Dags that show the operators where they need more than one machine; copy one into your Dags folder."""
