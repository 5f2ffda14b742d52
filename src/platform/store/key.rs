//! Which keys there are. The rules are those of the strictest store, so that a repository can be copied from any
//! store to any other.

use crate::error::{Error, Result};

/// Where the local store keeps half-written files; no store has objects there.
pub const TEMPORARY: &str = "tmp";

/// The longest name a file system takes.
const COMPONENT_LEN_MAX: usize = 255;

/// The longest key that the usual object stores take.
const KEY_LEN_MAX: usize = 1024;

/// Refuses a key that could leave the store, that some store cannot hold, or that is not an object's.
pub fn check_key(key: &str) -> Result<()> {
    if key.len() > KEY_LEN_MAX {
        return Err(Error::usage(format!("the key {key:?} is longer than {KEY_LEN_MAX} bytes")));
    }
    if key.split('/').next() == Some(TEMPORARY) {
        return Err(Error::usage(format!("the key {key:?} is in {TEMPORARY}/, where there are no objects")));
    }
    key.split('/').try_for_each(|component| {
        check_component(component).map_err(|why| Error::usage(format!("the key {key:?} {why}")))
    })
}

/// Refuses what is neither empty nor a path of proper names that ends with a slash.
pub fn check_prefix(prefix: &str) -> Result<()> {
    if prefix.is_empty() {
        return Ok(());
    }
    match prefix.strip_suffix('/') {
        Some(path) => check_key(path),
        None => Err(Error::usage(format!("the prefix {prefix:?} does not end with a slash"))),
    }
}

fn check_component(component: &str) -> std::result::Result<(), &'static str> {
    match component {
        "" => Err("has an empty name in it"),
        "." | ".." => Err("has a relative name in it"),
        _ if component.len() > COMPONENT_LEN_MAX => Err("has a name longer than 255 bytes in it"),
        _ if component.bytes().any(|byte| byte.is_ascii_control()) => Err("has a control character in it"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[test]
    fn takes_ordinary_and_odd_names() {
        for key in ["a", "packs/ab/abcdef", "machines/a%20b/log/..x", "é/~{}*", "tmpfile", "a/tmp", "tmp.d/a"] {
            check_key(key).unwrap();
        }
        check_key(&"x".repeat(255)).unwrap();
        for prefix in ["", "a/", "a/b/"] {
            check_prefix(prefix).unwrap();
        }
    }

    #[test]
    fn refuses_what_could_leave_the_store() {
        for key in ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\0b", "a\nb", "tmp", "tmp/a"] {
            assert_eq!(check_key(key).unwrap_err().kind(), Kind::Usage, "{key:?}");
        }
        assert!(check_key(&"x".repeat(256)).is_err());
        assert!(check_key(&"x/".repeat(600)).is_err());
        for prefix in ["a", "/", "a//", "../", "tmp/"] {
            assert_eq!(check_prefix(prefix).unwrap_err().kind(), Kind::Usage, "{prefix:?}");
        }
    }
}
