from mine import model, picture_model


def digits():
    return model


def pictures():
    return picture_model
