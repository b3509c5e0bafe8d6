"""Quality of pictures: metrics, the pretrained networks that some metrics need, and complete evaluations."""
