//! The files in which AWS's own tools keep credentials and settings: `~/.aws/credentials` and `~/.aws/config`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Variables;
use crate::error::{Error, Result};

/// What the files say about one profile. Neither printed nor logged.
#[derive(Default)]
pub(super) struct Profile {
    values: BTreeMap<String, String>,
}

impl Profile {
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// Reads the profile that the environment names, or the default one. A profile that is named must be there.
    pub fn read(variables: &Variables) -> Result<Self> {
        let named = variables.get("AWS_PROFILE");
        let name = named.unwrap_or("default");
        let file = |variable: &str, default: &str| -> Option<PathBuf> {
            variables.get(variable).map(PathBuf::from).or_else(|| Some(Path::new(variables.get("HOME")?).join(default)))
        };
        let credentials = file("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials");
        let config = file("AWS_CONFIG_FILE", ".aws/config");
        let mut values = BTreeMap::new();
        // Of a name that is in both, the credentials file's value counts.
        let in_config = [format!("profile {name}"), name.to_owned()];
        let in_credentials = [name.to_owned()];
        let mut found = false;
        for (path, sections) in [(&config, &in_config[..]), (&credentials, &in_credentials[..])] {
            let Some(path) = path else { continue };
            match std::fs::read_to_string(path) {
                Ok(text) => found |= collect(&text, sections, &mut values),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io(format!("cannot read {}", path.display()), error)),
            }
        }
        if let (Some(named), false) = (named, found) {
            return Err(Error::usage(format!("AWS_PROFILE names {named}, and no file has a profile of that name"))
                .hint("add it to ~/.aws/credentials, or unset AWS_PROFILE"));
        }
        Ok(Self { values })
    }
}

/// Adds what these sections say, and says whether one of them is there.
fn collect(text: &str, sections: &[String], values: &mut BTreeMap<String, String>) -> bool {
    let (mut is_wanted, mut found) = (false, false);
    for line in text.lines() {
        if let Some(section) = line.trim().strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            is_wanted = sections.iter().any(|wanted| section.0.trim() == wanted);
            found |= is_wanted;
        } else if let (true, false, Some((name, value))) =
            // Lines that begin with a blank belong to the one before, of which nothing here has any use.
            (is_wanted, line.starts_with([' ', '\t', '#', ';']), line.split_once('='))
        {
            values.insert(name.trim().to_lowercase(), value.trim().to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn read(files: &Path, profile: Option<&str>) -> Result<Profile> {
        let home = ("HOME", files.to_str().unwrap());
        Profile::read(&Variables::of([home].into_iter().chain(profile.map(|name| ("AWS_PROFILE", name)))))
    }

    #[test]
    fn a_profile_is_put_together_from_both_files() {
        let home = tempfile::tempdir().unwrap();
        assert!(read(home.path(), None).unwrap().get("region").is_none());
        std::fs::create_dir(home.path().join(".aws")).unwrap();
        let credentials = "# mine\n[default]\naws_access_key_id = AK1\naws_secret_access_key=SK=1/+\n\n[ceph]\naws_access_key_id=AK2\n";
        let config = "[default]\nregion = eu-1\ns3 =\n  endpoint_url = http://nested\n[profile ceph]\nendpoint_url = http://ceph:7480\naws_access_key_id = ignored\n";
        std::fs::write(home.path().join(".aws/credentials"), credentials).unwrap();
        std::fs::write(home.path().join(".aws/config"), config).unwrap();
        let default = read(home.path(), None).unwrap();
        assert_eq!(default.get("aws_secret_access_key"), Some("SK=1/+"));
        assert_eq!((default.get("region"), default.get("endpoint_url")), (Some("eu-1"), None));
        let ceph = read(home.path(), Some("ceph")).unwrap();
        assert_eq!(ceph.get("aws_access_key_id"), Some("AK2"));
        assert_eq!(ceph.get("endpoint_url"), Some("http://ceph:7480"));
        assert_eq!(read(home.path(), Some("none")).map(|_| ()).unwrap_err().kind(), Kind::Usage);
    }
}
