-- One database each; Postgres runs this when its volume is new.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
