-- Airflow's database is made by the image; MLflow and Feast's registry get their own.
CREATE DATABASE mlflow;
CREATE DATABASE feast;
