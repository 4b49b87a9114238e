"""Android devices, by way of a real adb server. See ``android.AndroidDevice``."""
