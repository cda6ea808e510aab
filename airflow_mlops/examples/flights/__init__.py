"""The flights example: will a flight that leaves New York arrive more than 15 minutes late?

Predicted two hours before the scheduled departure, on the flights of 2013 that stand for a stream arriving month by
month. :mod:`~airflow_mlops.examples.flights.source` lands a month, ``quality`` checks it, ``features`` turns it into
feature tables and labelled entities, ``train`` is the training loop, and ``experiment`` replays the year as a plain
script. Nothing here imports Airflow.
"""
