"""Feature data: the point-in-time join behind training sets and the rules for writing to an online store.

Nothing here imports Airflow. :mod:`airflow_mlops.features.asof` is the join on Arrow tables,
:mod:`~airflow_mlops.features.training_set` drives it by the definitions in a Feast registry,
:mod:`~airflow_mlops.features.materialize` counts and orders what goes into the online store and
:mod:`~airflow_mlops.features.repository` applies a folder of definitions.
"""
