package netdev

// Fact is something about this host that a device depends on. What finds it out changes nothing on the host.
type Fact struct {
	What   string // in a few words
	OK     bool
	Detail string // what was found
	Fix    string // what to do when it is not OK, else ""
}
