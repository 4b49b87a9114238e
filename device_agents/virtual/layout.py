"""Where things lie inside a virtual phone, and who its shell user is."""

APEX = "/apex/com.android.adbd"
ADBD = f"{APEX}/bin/adbd"
LIBRARIES = f"{APEX}/lib64"
QEMU = "/apex/com.kvfarm.qemu/qemu-aarch64"
SERVICES_SOCKET = "dev/socket/services"


SHELL_UID = 2000
# AOSP system/core/libcutils android_filesystem_config.h
GROUPS = {
    "input": 1004,
    "log": 1007,
    "adb": 1011,
    "sdcard_rw": 1015,
    "sdcard_r": 1028,
    "ext_data_rw": 1078,
    "ext_obb_rw": 1079,
    "net_bt_admin": 3001,
    "net_bt": 3002,
    "inet": 3003,
    "net_bw_stats": 3006,
    "readproc": 3009,
    "uhid": 3011,
    "readtracefs": 3012,
}
