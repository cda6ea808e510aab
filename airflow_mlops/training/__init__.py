"""Training with Ray Train: one contract, wherever the driver runs.

``python -m airflow_mlops.training --spec FILE_OR_URI`` runs one attempt of one training run. The run's directory,
``{storage_path}/{run_key}``, is the truth about it: Ray Train's checkpoints, and in ``_mlops`` the specs of the
attempts, their owner and the result.
"""
