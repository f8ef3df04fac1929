//! One setting of glibc's allocator, for memory that follows what is held and not what was.

/// Blocks of 128 KiB and more get pages of their own and give them back when they are freed.
///
/// This is glibc's default too, until a larger block is freed: then it raises the threshold to that block's
/// size, up to 32 MiB, and large payloads leave holes among small blocks. Peaks then were half as high again,
/// and stayed. Naming the threshold keeps it where it is. See `docs/decisions/0013` and `mallopt(3)`.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub fn give_large_blocks_back() {
    const THRESHOLD: libc::c_int = 128 * 1024;
    // SAFETY: a number goes into glibc's own settings, under its own lock; no memory of ours is concerned.
    // A refusal leaves things as they were.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, THRESHOLD) };
}

/// Other C libraries have no such setting.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn give_large_blocks_back() {}
