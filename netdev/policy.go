package netdev

import (
	"fmt"
	"slices"
	"strings"
)

// Policy says when frames leave from the guest's own pages, of a device that can do it.
type Policy uint8

// The policies.
const (
	Auto Policy = iota // from a size on, for as long as the kernel does not copy all the same
	On                 // always, whatever the kernel does with it
	Off                // never
)

var policies = []string{"auto", "on", "off"}

// String is the policy's name in options.
func (p Policy) String() string { return policies[p] }

// ParsePolicy is the policy of a name.
func ParsePolicy(s string) (Policy, error) {
	i := slices.Index(policies, s)
	if i < 0 {
		return Auto, fmt.Errorf("zero-copy %q: want %s", s, strings.Join(policies, ", "))
	}
	return Policy(i), nil
}
