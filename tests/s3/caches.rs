//! The cache on a host's disk: what was read once is not fetched again, by whatever process, and it never lies.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::proxy::{Fault, Proxy, Rule};
use crate::server::ceph;
use crate::world::{Host, noise};

fn files(directory: &Path) -> Vec<PathBuf> {
    let below = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    below(directory).flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// The files of a host's cache.
fn cached(host: &Host) -> Vec<PathBuf> {
    let of_repository = std::fs::read_dir(host.path("state")).unwrap().next().unwrap().unwrap().path();
    files(&of_repository.join("cache"))
}

#[test]
fn a_warm_host_restores_without_fetching_pages_and_keeps_them_to_itself() {
    let Some(server) = ceph("a warm host") else { return };
    let host = Host::new(&server);
    let memory = noise(41, 12 << 20);
    host.commit("web1", &memory);
    let other = host.another();
    let first = other.ok(["warm", "web1", "--json"]).json();
    let fetched = first["fetched_bytes"].as_u64().unwrap();
    assert!((12 << 20..13 << 20).contains(&fetched), "{first}");
    for field in ["epoch", "streams", "read_bytes", "fetched_bytes", "cache", "elapsed_ms"] {
        assert!(!first[field].is_null(), "no {field} in {first}");
    }
    let again = other.ok(["warm", "web1", "--json"]).json();
    assert!(again["fetched_bytes"].as_u64().unwrap() < 10_000, "{again}");
    // Not a page travels any more: whoever asks for one gets nothing.
    let proxy = Proxy::new(server.endpoint());
    proxy.add(Rule::new("GET", "/packs/", usize::MAX, Fault::Answer("500 Internal Server Error", "InternalError")));
    let mut through = other;
    through.endpoint = proxy.url();
    assert!(through.memory("web1") == memory);
    assert_eq!(proxy.befallen(), 0);
    let files = cached(&through);
    assert!(!files.is_empty());
    for file in &files {
        assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600, "{}", file.display());
        assert_eq!(std::fs::metadata(file.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
    }
    // Damaged on the disk: read from the store again. With that away too, an error, and never a wrong byte.
    for file in &files {
        let mut bytes = std::fs::read(file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        std::fs::write(file, bytes).unwrap();
    }
    through.patience_s = 2;
    let to = through.path("refused");
    assert_eq!(through.run(["export", "web1", "--output", to.to_str().unwrap()]).code, 1);
    proxy.clear();
    assert!(through.memory("web1") == memory);
}

#[test]
fn p5_what_was_damaged_on_its_way_does_not_stay() {
    let Some(server) = ceph("damage on its way") else { return };
    let host = Host::new(&server);
    // Too much for a record to carry.
    let memory = noise(42, 4 << 20);
    host.commit("web1", &memory);
    let proxy = Proxy::new(server.endpoint());
    proxy.add(Rule::new("GET", "/packs/", 1, Fault::Flip));
    proxy.add(Rule::new("GET", "/log/", 1, Fault::Flip));
    let through = Host::at(&server, &host.url, &proxy.url());
    assert!(through.memory("web1") == memory);
    assert!(through.memory("web1") == memory);
    assert_eq!(proxy.befallen(), 2);
}

#[test]
fn without_room_for_a_cache_everything_goes_on() {
    let Some(server) = ceph("no room for a cache") else { return };
    let host = Host::new(&server);
    let memory = noise(43, 6 << 20);
    host.commit("web1", &memory);
    let other = host.another();
    other.ok(["--cache-size", "1M", "warm", "web1"]);
    let used: u64 = cached(&other).iter().map(|file| std::fs::metadata(file).unwrap().len()).sum();
    assert!(used <= 2 << 20, "{used}");
    assert!(other.memory("web1") == memory);
    let none = host.another();
    none.ok(["--cache-size", "0", "show", "web1"]);
    assert_eq!(none.run(["--cache-size", "0", "warm", "web1"]).code, 2);
    // A file where the cache should be.
    let state = std::fs::read_dir(other.path("state")).unwrap().next().unwrap().unwrap().path();
    std::fs::remove_dir_all(state.join("cache")).unwrap();
    std::fs::write(state.join("cache"), b"in the way").unwrap();
    assert!(other.memory("web1") == memory);
    assert!(other.run(["warm", "web1"]).err.contains("could not keep"));
}
