"""The demo: a small ResNet on scikit-learn's digits, with Batch Norm and with Deep Control."""
