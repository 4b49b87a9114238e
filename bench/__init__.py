"""Speed of the engine beside onnxruntime-genai's, and beside what the memory allows (``make bench``)."""
