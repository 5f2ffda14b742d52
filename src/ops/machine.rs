//! What this machine is, so that a figure or a finding can be told from another machine's.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::OnceLock;

/// The facts that figures depend on.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Machine {
    pub epochfs: &'static str,
    pub kernel: String,
    pub architecture: String,
    pub processor: String,
    pub processors: usize,
    /// The instructions that hashing uses.
    pub vector_unit: &'static str,
    pub memory_bytes: u64,
}

impl Machine {
    pub fn of_this_process() -> Self {
        let uname = rustix::system::uname();
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        Self {
            epochfs: env!("CARGO_PKG_VERSION"),
            kernel: uname.release().to_string_lossy().into_owned(),
            architecture: uname.machine().to_string_lossy().into_owned(),
            processor: processor_name(&read("/proc/cpuinfo")),
            processors: processors(),
            vector_unit: vector_unit().0,
            memory_bytes: memory_field(&read("/proc/meminfo"), "MemTotal").unwrap_or(0),
        }
    }
}

/// How many threads can run at once.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn processor_name(text: &str) -> String {
    text.lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

/// The note of an epoch that names what the processors had on which its machine ran.
pub const PROCESSOR_NOTE: &str = "epochfs.cpu";

/// What this host's processors have, in order.
pub fn processor_features() -> Vec<String> {
    features_in(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn features_in(text: &str) -> Vec<String> {
    let line = text.lines().find_map(|line| {
        let (name, flags) = line.split_once(':')?;
        matches!(name.trim(), "flags" | "Features").then_some(flags)
    });
    let mut features: Vec<String> = line.unwrap_or_default().split_ascii_whitespace().map(str::to_owned).collect();
    features.sort_unstable();
    features.dedup();
    features.truncate(epochfs_format::HOST_FEATURES_MAX);
    features
}

/// What an epoch of a machine that runs here says of this host's processors; nothing where they cannot be told.
pub fn processor_notes() -> Vec<(String, String)> {
    static NOTE: OnceLock<String> = OnceLock::new();
    let note = NOTE.get_or_init(|| processor_features().join(" "));
    if note.is_empty() { Vec::new() } else { vec![(PROCESSOR_NOTE.to_owned(), note.clone())] }
}

/// What the notes of an epoch say that the processors had on which its machine ran, if they say it.
pub fn noted_features(notes: &[(String, String)]) -> Option<BTreeSet<String>> {
    let (_, note) = notes.iter().find(|(name, _)| name == PROCESSOR_NOTE)?;
    Some(note.split_ascii_whitespace().map(str::to_owned).collect())
}

/// A value in KiB from /proc/meminfo, in bytes.
pub fn memory_field(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The widest instructions that hashing uses here, and whether they are wide.
#[cfg(target_arch = "x86_64")]
pub fn vector_unit() -> (&'static str, bool) {
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
        ("AVX-512", true)
    } else if is_x86_feature_detected!("avx2") {
        ("AVX2", true)
    } else if is_x86_feature_detected!("sse4.1") {
        ("SSE4.1", false)
    } else {
        ("SSE2", false)
    }
}

#[cfg(target_arch = "aarch64")]
pub fn vector_unit() -> (&'static str, bool) {
    ("NEON", true)
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub fn vector_unit() -> (&'static str, bool) {
    ("portable code", false)
}

/// The kind of file system that a directory is on: the longest mount point above it.
pub fn file_system_of(directory: &Path) -> String {
    let directory = std::fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let longest = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            fields.next().zip(fields.next())
        })
        .filter(|(mount, _)| directory.starts_with(mount))
        // Of two mounts on one point the later one is seen.
        .max_by_key(|(mount, _)| mount.len());
    longest.map_or("unknown".to_owned(), |(_, kind)| kind.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_read() {
        let text = "MemTotal:       24 kB\nMemAvailable:   12 kB\nMemAvailableOther: 7 kB\n";
        assert_eq!(memory_field(text, "MemAvailable"), Some(12 << 10));
        assert_eq!(memory_field(text, "Mem"), None);
        assert_eq!(processor_name("processor\t: 0\nmodel name\t: A B @ 2 GHz\n"), "A B @ 2 GHz");
        assert_eq!(processor_name(""), "unknown");
        assert_eq!(file_system_of(Path::new("/proc/self")), "proc");
    }

    #[test]
    fn features_are_in_order_and_each_once_and_read_back_from_notes() {
        assert_eq!(features_in("processor\t: 0\nflags\t\t: sse fpu avx2 sse\nflags\t: x\n"), ["avx2", "fpu", "sse"]);
        assert!(features_in("").is_empty());
        let here: BTreeSet<String> = processor_features().into_iter().collect();
        assert_eq!(noted_features(&processor_notes()).unwrap_or_default(), here);
        assert_eq!(noted_features(&[("other".into(), "sse".into())]), None);
    }
}
