//! How much memory there is, and how much this process has.

/// Bytes that the machine has, or that the cgroup of this process may have, if that is less. `None` where neither can be read.
pub(crate) fn of_machine() -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
    });
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let bounds = bounds_of(&groups).into_iter().filter_map(|path| read(&path)?.trim().parse::<usize>().ok());
    machine.into_iter().chain(bounds).min()
}

/// The files that bound the memory of the cgroups in which a process is, from what `/proc/self/cgroup` says: of its own and of all above it. A
/// file that is not there, or says `max`, bounds nothing; of the first version of cgroups one says a number near 2^63.
fn bounds_of(groups: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            "memory" => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => continue,
        };
        // As it is seen from within a container its own group is the root.
        for dir in std::path::Path::new(path).ancestors() {
            files.push(format!("{root}{}/{file}", dir.display().to_string().trim_end_matches('/')));
        }
    }
    files
}

/// Bytes that the allocator has handed out, and bytes that it holds.
#[cfg(all(feature = "jemalloc", not(target_env = "msvc")))]
pub(crate) fn in_use() -> Option<(usize, usize)> {
    use tikv_jemalloc_ctl::{epoch, stats};
    epoch::advance().ok()?;
    Some((stats::allocated::read().ok()?, stats::resident::read().ok()?))
}

/// Without that allocator nobody counts it.
#[cfg(not(all(feature = "jemalloc", not(target_env = "msvc"))))]
pub(crate) fn in_use() -> Option<(usize, usize)> {
    None
}

/// Bytes that are handed out: what is free again may be kept by the allocator, and is no load.
pub(crate) fn allocated() -> Option<usize> {
    in_use().map(|(allocated, _)| allocated)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_no_more_than_each_of_its_cgroups() {
        let files = bounds_of("12:memory:/a\n0::/system.slice/mainstay.service\n3:cpu:/b\n");
        assert_eq!(
            files,
            [
                "/sys/fs/cgroup/memory/a/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes",
                "/sys/fs/cgroup/system.slice/mainstay.service/memory.max",
                "/sys/fs/cgroup/system.slice/memory.max",
                "/sys/fs/cgroup/memory.max",
            ]
        );
        assert!(of_machine().is_some_and(|bytes| bytes > 1 << 20));
    }
}
