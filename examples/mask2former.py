"""Mask2Former of transformers with the fused loss and the fused label maps. Random weights, no downloads.

pip install 'segvit-kernels[transformers]'
python -m examples.mask2former

With real weights only the way to the model changes: Mask2FormerForUniversalSegmentation.from_pretrained.
MaskFormer, OneFormer and EoMT go the same way.
"""

import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from segvit_kernels.integrations import post_process_semantic_segmentation, use_fused_loss

CLASSES = 5


def tiny_model() -> Mask2FormerForUniversalSegmentation:
    """A model of 0.1 million parameters."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=stages
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        encoder_feedforward_dim=32,
        decoder_layers=3,
        dim_feedforward=32,
        num_attention_heads=2,
        num_queries=20,
        num_labels=CLASSES,
    )
    return Mask2FormerForUniversalSegmentation(config)


def main() -> None:
    """Train on two images of coloured stripes, then compare the label maps."""
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (2, 8, 1)).repeat_interleave(8, 1).expand(2, 64, 64)
    colours = torch.randn(CLASSES, 3)
    pixels = colours[labels].permute(0, 3, 1, 2) + 0.1 * torch.randn(2, 3, 64, 64)
    class_labels = [image.unique() for image in labels]
    # Boolean masks take a quarter of the memory of the image processor's float masks.
    mask_labels = [
        image == present[:, None, None] for image, present in zip(labels, class_labels, strict=True)
    ]

    model = use_fused_loss(tiny_model())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(21):
        loss = model(pixel_values=pixels, mask_labels=mask_labels, class_labels=class_labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step:3d}   loss {loss.item():6.2f}")

    with torch.no_grad():
        outputs = model.eval()(pixel_values=pixels)
    sizes = [(480, 640)] * 2
    ours = post_process_semantic_segmentation(outputs, sizes)
    theirs = Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs, sizes)
    same = torch.stack([(a == b).float().mean() for a, b in zip(ours, theirs, strict=True)]).mean()
    print(f"label maps {tuple(ours[0].shape)}: {100 * same:.3f} % equal to the image processor's")


if __name__ == "__main__":
    main()
