//! How much memory there is, and how much this process has.

/// Bytes that the machine has, or that the cgroup of this process may have, if that is less. `None` where neither can be read.
pub(crate) fn of_machine() -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
    });
    // The second is that of the first version of cgroups, which says a number near 2^63 where there is no limit.
    let groups = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let group = groups.into_iter().find_map(|path| read(path)?.trim().parse::<usize>().ok());
    machine.into_iter().chain(group).min()
}

/// Bytes that the allocator has handed out, and bytes that it holds.
#[cfg(not(target_env = "msvc"))]
pub(crate) fn in_use() -> Option<(usize, usize)> {
    use tikv_jemalloc_ctl::{epoch, stats};
    epoch::advance().ok()?;
    Some((stats::allocated::read().ok()?, stats::resident::read().ok()?))
}

#[cfg(target_env = "msvc")]
pub(crate) fn in_use() -> Option<(usize, usize)> {
    None
}

/// Bytes that are handed out: what is free again may be kept by the allocator, and is no load.
pub(crate) fn allocated() -> Option<usize> {
    in_use().map(|(allocated, _)| allocated)
}
