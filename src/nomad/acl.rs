//! Who a token belongs to.

use serde::Deserialize;

use super::client::{Client, Request};
use super::error::Error;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Token {
    #[serde(rename = "AccessorID")]
    accessor: String,
}

impl Client {
    /// The accessor of this client's token, which names it and is no secret. Without ACLs, and without a token, it is the
    /// same for everybody. [`super::Kind::Forbidden`] where Nomad does not know the token.
    pub async fn accessor(&self) -> Result<String, Error> {
        let request = Request::get(&["acl", "token", "self"], "asking Nomad whose token this is".to_owned());
        Ok(self.call::<Token>(request).await?.value.accessor)
    }
}
