"""llama_cpp"""
