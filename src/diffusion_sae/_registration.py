"""Making the artifacts known to transformers: Auto classes and pipeline("diffusion-probe")."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .probes.configuration import DiffusionProbeConfig
from .probes.image_processing import DiffusionImageProcessor
from .probes.modeling import DiffusionProbe
from .probes.pipeline import DiffusionProbePipeline
from .sae.configuration import KSparseAutoencoderConfig
from .sae.modeling import KSparseAutoencoder
from .zoo import DEFAULT_PROBE, embedded_path

TASK = "diffusion-probe"


def register() -> None:
    for config, model in ((KSparseAutoencoderConfig, KSparseAutoencoder), (DiffusionProbeConfig, DiffusionProbe)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    AutoModelForImageClassification.register(DiffusionProbeConfig, DiffusionProbe, exist_ok=True)
    AutoImageProcessor.register(
        DiffusionProbeConfig, image_processor_classes={"pil": DiffusionImageProcessor}, exist_ok=True
    )
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=DiffusionProbePipeline,
            pt_model=AutoModelForImageClassification,
            default={"model": (str(embedded_path(DEFAULT_PROBE) or DEFAULT_PROBE), "main")},
            type="image",
        )
        # transformers marks the class as custom code: pipe.save_pretrained would copy it beside the weights, and
        # loading would ask for trust, though the package is installed
        del DiffusionProbePipeline._registered_impl  # type: ignore[attr-defined]
