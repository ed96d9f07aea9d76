"""This library's ops inside other libraries' models; each module imports its library when used."""
