"""Files that are written for something else: other trainers' configurations, known by their keys, and JSON and YAML.

One problem says what such a file is; read as a configuration, each of its keys would be one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vtrain.contract import Problem


@dataclass(frozen=True)
class Format:
    """What another trainer reads. name: of such a file. keys: those that vtrain has nowhere. remedy: where to go from it."""

    name: str
    keys: frozenset[str]
    remedy: str


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SIMPLETUNER = Format(
    "a configuration of SimpleTuner",
    _words("""
        model_type model_family pretrained_model_name_or_path pretrained_vae_model_name_or_path
        resume_from_checkpoint max_train_steps num_train_epochs train_batch_size gradient_accumulation_steps
        checkpoint_step_interval checkpoints_total_limit tracker_run_name tracker_project_name report_to push_to_hub
        mixed_precision base_model_precision quantize_via
        enable_group_offload group_offload_type group_offload_blocks_per_group group_offload_use_stream
        group_offload_to_disk_path enable_model_cpu_offload
        learning_rate lr_scheduler lr_warmup_steps max_grad_norm grad_clip_method caption_dropout_probability
        use_ema ema_update_interval ema_validation lora_rank lora_alpha
        data_backend_config vae_batch_size compress_disk_cache delete_problematic_images framerate ignore_final_epochs
        flow_schedule_shift flow_schedule_auto_shift
        validation_prompt validation_negative_prompt validation_guidance validation_num_inference_steps validation_seed
        validation_resolution validation_num_video_frames validation_step_interval validation_prompt_library
        user_prompt_library validation_preview validation_preview_steps
        type dataset_type default disabled instance_data_dir caption_strategy metadata_backend
        minimum_image_size maximum_image_size target_downsample_size cache_dir_vae cache_dir write_batch_size
        num_frames bucket_strategy frame_interval is_i2v
    """),
    "docs/simpletuner.md says what each of its keys is called here, data included: all of it is one TOML file.",
)
_ONE_FILE = "A run and its data are described by one TOML file: docs/configuration.md shows the least one."
FORMATS = (
    SIMPLETUNER,
    Format(
        "a dataset file of musubi-tuner",
        _words("""
            general datasets subsets caption_extension enable_bucket bucket_no_upscale num_repeats
            video_directory image_directory control_directory video_jsonl_file image_jsonl_file cache_directory
            target_frames frame_extraction frame_stride frame_sample source_fps
        """),
        _ONE_FILE,
    ),
    Format(
        "a configuration of diffusion-pipe",
        _words("""
            dataset eval_datasets micro_batch_size_per_gpu eval_micro_batch_size_per_gpu pipeline_stages gradient_clipping
            gradient_accumulation_steps eval_gradient_accumulation_steps warmup_steps eval_every_n_epochs
            eval_before_first_step save_every_n_epochs save_every_n_steps checkpoint_every_n_minutes
            checkpoint_every_n_epochs activation_checkpointing partition_method save_dtype caching_batch_size
            steps_per_print video_clip_mode blocks_to_swap adapter type dtype transformer_path transformer_dtype llm_path
            clip_path ckpt_path timestep_sample_method monitoring enable_wandb
            resolutions enable_ar_bucket min_ar max_ar num_ar_buckets ar_buckets frame_buckets size_buckets directory
            mask_path num_repeats
        """),
        _ONE_FILE,
    ),
    Format(
        "a dataset file of finetrainers",
        _words("""
            datasets data_root dataset_type dataset_file id_token caption_column video_column
            video_resolution_buckets image_resolution_buckets reshape_mode remove_common_llm_caption_prefixes
        """),
        _ONE_FILE,
    ),
)


def format_of(keys: Iterable[str]) -> Format | None:
    """The format that a file with these keys has; None if it may be one of ours.

    Three keys at least, and half of all that it has, are of that format: a few in a file of ours are told one by one.
    """
    names = {key.lstrip("-").replace("-", "_") for key in keys}
    found = max(FORMATS, key=lambda each: len(names & each.keys))
    hits = len(names & found.keys)
    return found if hits >= 3 and 2 * hits >= len(names) else None


def problem_of(where: str, keys: Iterable[str]) -> Problem | None:
    """What is wrong with a file that another trainer reads; None if it may be one of ours."""
    found = format_of(keys)
    return None if found is None else Problem(where, f"this is {found.name}, not of vtrain.", found.remedy)


_JSON = re.compile(r"\s*(\{|\[\s*\{|\[\s*\n)")
_JSON_KEY = re.compile(r'"([\w-]+)"\s*:')
_YAML_LINE = re.compile(r"(- )?[\w-]+:( |$)")
_TOML_LINE = re.compile(r"\s*(\[|[\w.-]+\s*=)")


def language_problem(where: str, text: str) -> Problem | None:
    """What is wrong with a text that is no TOML, if it is JSON or YAML; both need not be sound. None for others."""
    if _JSON.match(text):
        return problem_of(where, _JSON_KEY.findall(text)) or Problem(where, "this is JSON, not TOML.", _ONE_FILE)
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("#", "---"))]
    is_yaml = bool(lines) and _YAML_LINE.match(lines[0]) and not any(map(_TOML_LINE.match, lines))
    return Problem(where, "this is YAML, not TOML.", _ONE_FILE) if is_yaml else None
