def late(text):
    return text + "late"
