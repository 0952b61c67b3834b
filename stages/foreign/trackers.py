"""Trackers of experiments, and the Hugging Face Hub."""

from __future__ import annotations

from stages.foreign.concept import AXOLOTL, COMMON, FACTORY, TRANSFORMERS, TRL, VERL, Concept, called

CONCEPTS = (
    Concept(
        {"wandb_project": AXOLOTL, "use_wandb": COMMON, "use_tensorboard": AXOLOTL}
        | {"project": TRANSFORMERS, "logger": VERL, "project_name": VERL},
        ("report_to",),
        "report_to: [wandb]",
        "or tensorboard, trackio, mlflow; the project is posttrain- and the recipe's name",
    ),
    Concept(
        {"wandb_entity": AXOLOTL, "wandb_run_id": AXOLOTL, "wandb_name": AXOLOTL, "run_name": TRL}
        | {"wandb_mode": AXOLOTL, "wandb_watch": AXOLOTL, "wandb_log_model": AXOLOTL, "experiment_name": VERL},
        ("report_to",),
        "report_to: [wandb]",
        "Weights & Biases reads the rest from its environment variables",
    ),
    Concept(
        called(AXOLOTL, "use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name")
        | called(AXOLOTL, "hf_mlflow_log_artifacts"),
        ("report_to",),
        "report_to: [mlflow]",
        "MLflow reads the rest from its environment variables",
    ),
    Concept(
        called(TRANSFORMERS, "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        ("report_to",),
        "report_to: [trackio]",
    ),
    Concept(
        called(AXOLOTL, "use_comet", "comet_api_key", "comet_workspace", "comet_project_name", "comet_mode")
        | called(FACTORY, "use_swanlab", "swanlab_project", "swanlab_run_name"),
        note="`report_to` takes tensorboard, wandb, trackio and mlflow, not this one; metrics.jsonl of the output has "
        "every step",
    ),
    Concept(
        {"push_to_hub": TRL, "hub_model_id": "TRL, Axolotl", "hub_strategy": "TRL, Axolotl"}
        | called(TRL, "hub_private_repo", "hub_revision", "hub_token")
        | called(TRANSFORMERS, "hub_always_push"),
        note="a stage of its own uploads what another one made: `uses: push_to_hub`, `with: {repo: owner/name}`, "
        "with the token of HF_TOKEN",
    ),
)
